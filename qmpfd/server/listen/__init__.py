"""Where clients connect: listening sockets, the accept loop, who is admitted."""
