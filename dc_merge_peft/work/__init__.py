"""What runs keep on disk while they are at work, and by which they know of each other: hidden folders beside an output, finished
modules that an interrupted merge goes on from, and the signs of life of several processes."""
