"""How fast and how small: what scripts/benchmark.py measures, each figure beside what it is compared with.

settings    what to measure    suites/   what is measured    comparing   contenders in turns    rows   one figure
networks    ours, ready to draw    peers   the same weights in diffusers and transformers
timing      turns and medians    memory   peaks    roofline   counted operations, and what this machine can do at best
profiling   where time goes    machine   on what it was measured    report   table, JSON and plot
job         a measurement in a process of its own
"""
