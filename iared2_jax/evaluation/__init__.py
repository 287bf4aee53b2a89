"""Evaluators: accuracy, cost, speed, segmentation."""
