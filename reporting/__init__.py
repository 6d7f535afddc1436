"""What a person reads of a run: its summary, tables, figures, heat maps and page.

Fits nothing. May import detector and all that detector may."""
