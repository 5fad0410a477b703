"""Machines: what runs a virtual machine."""
