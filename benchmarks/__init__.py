"""Benchmarks of scripts/benchmark.py (speed, memory) and scripts/evaluate.py (accuracy on synthetic scenes).

settings   what to measure, and results    measure   time, memory, operations    compare   interleaved contenders
networks   our networks and baselines      suites/   what is measured            report    table, JSON, plot
shapes/    evaluator of synthetic scenes, prompt sets, sampling settings
"""
