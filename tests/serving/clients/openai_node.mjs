// openai-node: a chat of three turns, a stream, a structured answer, an error. Prints one JSON object.
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [];
for (let turn = 0; turn < 3; turn++) {
  messages.push({ role: "user", content: `Turn ${turn}` });
  const answer = await client.chat.completions.create({ model: "tiny", messages, max_tokens: 6 });
  messages.push(answer.choices[0].message);
}
let streamed = "";
const first = messages.slice(0, 1);
for await (const chunk of await client.chat.completions.create({ model: "tiny", messages: first, max_tokens: 6, stream: true }))
  streamed += chunk.choices[0]?.delta?.content ?? "";
const person = z.object({ mood: z.enum(["calm", "wild"]), ok: z.boolean() });
const parsed = await client.chat.completions.parse({
  model: "tiny", messages: first, max_tokens: 99, response_format: zodResponseFormat(person, "person"),
});
const response = await client.responses.create({ model: "tiny", input: "Hello", max_output_tokens: 6 });
const next = await client.responses.create({
  model: "tiny", input: "And?", max_output_tokens: 6, previous_response_id: response.id,
});
const embedding = await client.embeddings.create({ model: "tiny", input: ["a", "b"] });
let error = null;
try {
  await client.chat.completions.create({ model: "tiny", messages: first, max_tokens: 10 ** 9 });
} catch (refused) {
  error = { status: refused.status, param: refused.param, code: refused.code };
}
console.log(JSON.stringify({
  turns: messages.length, streamed, parsed: parsed.choices[0].message.parsed, response: response.output_text,
  next: next.output_text, embeddings: embedding.data.map((one) => one.embedding.length), error,
}));
