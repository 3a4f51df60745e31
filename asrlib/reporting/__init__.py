"""What was measured, for people: numbers, tables, figures, pages."""
