"""Tests of LoRAs inside a model."""
