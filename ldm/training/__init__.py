"""Training, run by Lightning: what `scripts/train.py` is made of.

trainer_settings   Trainer settings of older Lightning versions in today's terms
configs      YAML files and dotlist to one set of settings; what a resumed run may not change
folders      run folders: names, what is written into them at the start, finding one again
seeding      every draw of a step from the number of the step
continuing   the exact place that a run is at, kept in its checkpoints
checkpoints  which checkpoints are written when, each whole or not at all
stopping     signals: save and stop, or save and go on
loggers      metrics as a CSV file and for TensorBoard
images       pictures of what the model does, on disk as the public code lays them out
guards       a loss that is not finite ends the run
curves       a plot of the run at its end
run          all of it together
"""
