"""Tests of training of LoRAs and gates."""
