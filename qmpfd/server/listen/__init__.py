"""Listening sockets, the accept loop, and the admission of clients."""
