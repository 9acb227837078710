"""What runs, searches, soups and recipes were and gave: one page to read."""
