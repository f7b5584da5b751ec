"""The daemon: listeners, a session per connection, and the end of both."""
