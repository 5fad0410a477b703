"""Transports: how bytes get from the host to the agent in a machine."""
