"""Tests of benchmarks and their reports."""
