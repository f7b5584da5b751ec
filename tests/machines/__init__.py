"""The daemon under service managers, in containers, and from cron.

Most of these tests need root to make namespaces; each states its needs.
"""
