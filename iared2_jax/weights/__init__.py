"""Trained weights in and out: files of many projects, and ours."""
