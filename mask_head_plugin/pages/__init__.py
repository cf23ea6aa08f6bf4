"""The common style of result pages: template, tables, figures, pictures."""
