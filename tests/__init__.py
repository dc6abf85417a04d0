"""Tests of mole_diffusion; a package so that tests can share `tests.tiny`."""
