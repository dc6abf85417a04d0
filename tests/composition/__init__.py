"""Tests of what weighs LoRAs: methods, regions, words."""
