"""The common style of result pages: templates, tables, figures and pictures."""
