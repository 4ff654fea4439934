"""Training with Lightning: what `scripts/train.py` runs.

settings     YAML files and dotlist to the settings of a run; what a resumed run may change
run          model, data, Trainer, and messages for failures
checkpoints  which checkpoints are written when; the exact position that a run resumes at
callbacks    seeds, images, progress, throughput, non-finite weights
metrics      CSV and TensorBoard loggers, and the plot of a run
signals      Ctrl-C, SIGTERM, SIGUSR1
strategies   DDP and FSDP
folders      run folders
compat       code and settings for Lightning 1
"""
