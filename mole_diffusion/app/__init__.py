"""`mole app`: the page. What it does lies in plain functions, one idea a file; `page.py` only lays it out."""
