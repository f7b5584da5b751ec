"""The daemon where others run it: under a service manager, in a container, out of cron.

These tests make namespaces, so most of them need root; each says what it needs.
"""
