"""What touches the kernel: descriptors and their owner, closes that may block, service managers."""
