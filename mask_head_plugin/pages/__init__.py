"""One style for pages of results: template, tables, figures, pictures."""
