"""What a person reads of a run: its summary, tables, figures, heat maps and page; two runs side by side.

Fits nothing. May import detector and all that detector may."""
