"""Weights: read, parse, plan, fit, write; and at both ends fetch, and the Hub."""
