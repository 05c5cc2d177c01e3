"""Submitting work to a cluster."""
