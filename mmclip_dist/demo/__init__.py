"""A local page that shows what a trained model makes of a radiograph: `mmclip demo`."""
