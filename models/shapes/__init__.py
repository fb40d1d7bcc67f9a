"""The shapes models: scenes of coloured shapes, and a small trained model of every task."""
