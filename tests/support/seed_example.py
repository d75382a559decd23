# ruff: noqa: W293
"""The example program from the page of the RunPod worker, unchanged."""

HOST = "https://api.runpod.ai"
PROGRAM = """
import requests
import json
import base64
from PIL import Image
import io

API_KEY = "YOUR_API_KEY"
ENDPOINT_ID = "YOUR_ENDPOINT_ID"

def generate_image(prompt):
    url = f"https://api.runpod.ai/v2/{ENDPOINT_ID}/run"
    
    payload = {
        "input": {
            "prompt": prompt,
            "negative_prompt": "ugly, deformed, bad anatomy, blurry",
            "num_inference_steps": 30,
            "guidance_scale": 7.5,
            "width": 1024,
            "height": 1024
        }
    }
    
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {API_KEY}"
    }
    
    response = requests.post(url, headers=headers, json=payload)
    response_json = response.json()
    
    # Get job ID
    job_id = response_json.get("id")
    
    # Check status and get result when complete
    status_url = f"https://api.runpod.ai/v2/{ENDPOINT_ID}/status/{job_id}"
    
    while True:
        status_response = requests.get(status_url, headers=headers)
        status_data = status_response.json()
        
        if status_data.get("status") == "COMPLETED":
            # Get the base64 image data
            image_data = status_data.get("output", [])[0]
            # Convert base64 to image
            image = Image.open(io.BytesIO(base64.b64decode(image_data)))
            # Save the image
            image.save("generated_image.png")
            print("Image generated successfully!")
            break
        
        time.sleep(2)  # Poll every 2 seconds

# Generate an image
generate_image("A photorealistic cat astronaut floating in space, 4k, detailed")
"""
