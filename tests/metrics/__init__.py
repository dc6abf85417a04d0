"""Tests of measures of pictures."""
