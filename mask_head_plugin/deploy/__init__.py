"""Exports trained models, and runs exported models without PyTorch.

Import from the modules directly, because the runtime must not load the exporter's dependencies.
"""
