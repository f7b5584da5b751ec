"""Compare the daemon's replies with QEMU's; every test can run against a real QEMU too."""
