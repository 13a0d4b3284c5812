"""Machines: what a host has, what others are described as, and what work costs on them."""
