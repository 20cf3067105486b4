"""What is done with a trained model: pictures, measurements and the report of a run, as plain functions."""
