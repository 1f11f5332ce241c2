"""`auto`: proposals priced by measured cost and calibrated acceptance."""
