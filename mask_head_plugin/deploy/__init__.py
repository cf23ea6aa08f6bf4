"""Trained models outside of PyTorch: export, and a runtime.

Import from the modules: the runtime must not load what the exporter needs.
"""
