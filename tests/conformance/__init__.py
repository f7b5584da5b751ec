"""Does the daemon answer as QEMU does?  Every test here can be pointed at a real QEMU too."""
