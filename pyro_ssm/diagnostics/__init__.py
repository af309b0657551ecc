"""stub"""
to_inference_data = None
