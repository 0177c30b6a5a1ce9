"""Roles that run the code of the user's own ComfyUI, under its interpreter: every family that it can load.

ComfyUI's modules are imported from the user's installation when an engine starts, never before and never elsewhere.
"""
