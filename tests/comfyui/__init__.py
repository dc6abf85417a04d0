"""Tests of the nodes for ComfyUI."""
