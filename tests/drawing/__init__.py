"""Tests of pictures that tell how they were made."""
