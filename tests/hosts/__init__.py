"""Tests on booted hosts, and what boots them."""
