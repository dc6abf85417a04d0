"""Tests of the toybox."""
