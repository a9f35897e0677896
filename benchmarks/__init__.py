"""Measurements of Megatron Lite beside its peers."""
