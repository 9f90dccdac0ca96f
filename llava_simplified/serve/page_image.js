// Get images from files and from the camera.

import { PageError } from "./page_client.js";

const byId = (id) => document.getElementById(id);

// ---- files ----

// Return the reason why a file of this type cannot be used, or "". Formats that are unknown here are sent to the server,
// which reads more formats than browsers do.
async function unsupportedType(file) {
  const head = String.fromCharCode(...new Uint8Array(await file.slice(0, 4).arrayBuffer()));
  if (file.type.startsWith("video/")) return "This file is a video. Only images are supported.";
  if (head.startsWith("%PDF")) return "This file is a PDF document. Save the page as an image first.";
  if (file.type === "image/svg+xml") return "SVG drawings are not supported. Export the drawing as PNG.";
  return "";
}

function readDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function checkSize(file, maxBody) {
  if (file.size === 0) throw new PageError("This file is empty.");
  // The body of a request contains the file as base64, which writes three bytes as four characters. Reserve 10 kB for
  // the conversation.
  const largest = (maxBody - 10_000) * 0.75;
  if (file.size <= largest) return;
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  throw new PageError(`This file is too large: it has ${megabytes(file.size)} MB, `
    + `the server accepts ${megabytes(largest)} MB.`);
}

// Return a file as a data URL. Throw PageError if it cannot be used.
export async function loadFile(file, maxBody) {
  checkSize(file, maxBody);
  let problem = "";
  try {
    problem = await unsupportedType(file);
    if (!problem) return await readDataUrl(file);
  } catch {
    problem = "The browser could not read this file.";
  }
  throw new PageError(problem);
}

// ---- the camera ----

async function openCamera(showProblem) {
  const video = byId("video");
  try {
    const wanted = { facingMode: "environment", width: { ideal: 1280 } };
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: wanted });
  } catch {
    showProblem("The camera cannot be used: there is none, or this page may not use it.");
    return;
  }
  byId("camera-dialog").showModal();
}

function takePhoto(usePhoto) {
  const video = byId("video");
  if (!video.videoWidth) return; // the camera has not started yet
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  const toFile = (blob) => new File([blob], "photo.jpg", { type: blob.type });
  canvas.toBlob((blob) => usePhoto(toFile(blob)), "image/jpeg", 0.95);
  byId("camera-dialog").close();
}

// Stop all tracks, which turns the camera and its light off.
function releaseCamera() {
  const video = byId("video");
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  video.srcObject = null;
}

// Connect the camera's button and dialog.
// usePhoto: receives a photo as a file. showProblem: receives a text for the user.
export function setUpCamera(usePhoto, showProblem) {
  if (!navigator.mediaDevices?.getUserMedia) return; // browsers offer it with https and on localhost only
  byId("camera").hidden = false;
  byId("camera").addEventListener("click", () => openCamera(showProblem));
  byId("shoot").addEventListener("click", () => takePhoto(usePhoto));
  byId("camera-cancel").addEventListener("click", () => byId("camera-dialog").close());
  byId("camera-dialog").addEventListener("close", releaseCamera);
}
