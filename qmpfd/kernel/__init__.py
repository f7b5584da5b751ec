"""System calls: descriptors and their owner, closes that may block, service managers."""
