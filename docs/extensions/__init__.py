"""What the site adds to Sphinx: formulas as MathML, and the pages that are made from the code."""
