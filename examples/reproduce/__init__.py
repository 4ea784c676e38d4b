"""The paper's tables at full scale: for people who have the checkpoints, the data and a GPU."""
