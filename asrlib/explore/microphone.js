// A button that records the browser's microphone and hands its samples to Python: float32, mono, RATE a second.
// The browser decodes what it recorded, so that nothing here depends on the format it records in.

const RATE = 16000;

async function samplesOf(blob) {
  const audio = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await blob.arrayBuffer());
  const mono = new Float32Array(audio.length);
  for (let channel = 0; channel < audio.numberOfChannels; channel++) {
    audio.getChannelData(channel).forEach((sample, i) => { mono[i] += sample / audio.numberOfChannels; });
  }
  return mono;
}

function render({ model, el }) {
  const button = document.createElement("button");
  button.className = "jupyter-button widget-button";
  el.append(button);
  let recorder = null;

  function show() {
    button.textContent = recorder ? "■ Stop" : "● Record";
    button.disabled = model.get("disabled") && !recorder;
  }

  async function start() {
    if (!navigator.mediaDevices) {
      throw new Error("this address may not use the microphone: open JupyterLab at localhost or over https");
    }
    // What makes a call pleasant for people is not what recognisers were trained on.
    const wanted = { echoCancellation: false, noiseSuppression: false };
    const stream = await navigator.mediaDevices.getUserMedia({ audio: wanted });
    const pieces = [];
    recorder = new MediaRecorder(stream);
    recorder.ondataavailable = ({ data }) => pieces.push(data);
    recorder.onstop = () => {
      stream.getTracks().forEach((track) => track.stop());
      recorder = null;
      show();
      samplesOf(new Blob(pieces)).then((mono) => model.send({ rate: RATE }, undefined, [mono.buffer]), fail);
    };
    recorder.start();
    const [mine, longest] = [recorder, 1000 * model.get("longest")];
    setTimeout(() => mine.state === "recording" && mine.stop(), longest);
  }

  function fail(error) {
    recorder = null;
    model.send({ problem: error.message || String(error) });
    show();
  }

  button.addEventListener("click", () => (recorder ? recorder.stop() : start().then(show, fail)));
  model.on("change:disabled", show);
  show();
  return () => {
    model.off("change:disabled", show);
    if (recorder) recorder.stop();
  };
}

export default { render };
