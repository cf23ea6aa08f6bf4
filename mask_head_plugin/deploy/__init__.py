"""Exports trained models, and runs exported models without PyTorch.

Import from the modules directly: the runtime must not load the dependencies of the exporter.
"""
