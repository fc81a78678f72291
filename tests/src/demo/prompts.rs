//! Prompts through the runner's Serve service, token by token, and the reference they must match.

use std::path::Path;
use std::time::Duration;

use berth_proto::v1::{
    DescribeRequest, DescribeResponse, FinishReason, Finished, GenerateRequest, TokenIds, generate_event::Event,
    generate_request::Prompt, serve_client::ServeClient,
};
use serde::Deserialize;
use tonic::transport::{Channel, Endpoint};

use crate::{Error, Result};

/// Longest time one prompt may take.
const PROMPT_DEADLINE: Duration = Duration::from_secs(60);
/// Longest time for anything else that a runner is asked.
const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// A prompt of the checkpoint's `reference.json`, or one of our own.
#[derive(Clone, Debug)]
pub struct Case {
    /// Token ids of the prompt.
    pub prompt_ids: Vec<u32>,
    /// Greedy continuation of the reference, where there is one.
    pub expected: Option<Vec<u32>>,
    /// Tokens to generate.
    pub max_tokens: u32,
}

#[derive(Deserialize)]
struct Reference {
    cases: Vec<ReferenceCase>,
}

#[derive(Deserialize)]
struct ReferenceCase {
    prompt_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
}

/// The cases to serve for a checkpoint: those of its `reference.json`, else two short prompts without an
/// expectation.
///
/// # Errors
/// When there is a `reference.json` that cannot be read.
pub fn read_cases(checkpoint: &Path) -> Result<Vec<Case>> {
    let path = checkpoint.join("reference.json");
    if !path.exists() {
        let own = [vec![0, 2, 3, 5, 7, 11, 13], vec![0, 17, 19, 23]];
        return Ok(own.map(|prompt_ids| Case { prompt_ids, expected: None, max_tokens: 12 }).into());
    }
    let text = std::fs::read(&path).map_err(Error::file("read", &path))?;
    let reference: Reference =
        serde_json::from_slice(&text).map_err(|error| Error::file("read", &path)(error.into()))?;
    let case = |case: ReferenceCase| Case {
        prompt_ids: case.prompt_ids,
        max_tokens: u32::try_from(case.greedy_ids.len()).unwrap_or(u32::MAX),
        expected: Some(case.greedy_ids),
    };
    Ok(reference.cases.into_iter().map(case).collect())
}

/// The longest sequence of a checkpoint, from its config.json.
///
/// # Errors
/// When the file cannot be read or does not tell.
pub fn context(checkpoint: &Path) -> Result<usize> {
    #[derive(Deserialize)]
    struct Config {
        max_position_embeddings: usize,
    }
    let path = checkpoint.join("config.json");
    let text = std::fs::read(&path).map_err(Error::file("read", &path))?;
    let config: Config = serde_json::from_slice(&text).map_err(|error| Error::file("read", &path)(error.into()))?;
    Ok(config.max_position_embeddings)
}

/// What came back for one prompt.
#[derive(Debug, Default)]
pub struct Answer {
    /// The generated tokens.
    pub ids: Vec<u32>,
    /// Placement revisions of the steps, without repeats.
    pub revisions: Vec<u64>,
    /// The runner's last word.
    pub finished: Finished,
}

/// A runner, reached directly.
#[derive(Clone, Debug)]
pub struct Runner {
    client: ServeClient<Channel>,
}

impl Runner {
    /// The runner at `endpoint` (`ip:port`); connects at the first call.
    ///
    /// # Errors
    /// When `endpoint` is no address.
    pub fn at(endpoint: &str) -> Result<Self> {
        let channel = Endpoint::from_shared(format!("http://{endpoint}"))
            .map_err(|error| Error::Runner { doing: "connect".into(), why: error.to_string() })?
            .connect_timeout(CALL_DEADLINE)
            .connect_lazy();
        Ok(Self { client: ServeClient::new(channel) })
    }

    /// Generates greedily, calling `on_token` with the number of tokens so far.
    ///
    /// # Errors
    /// When the runner cannot be reached, refuses, or ends the stream without its last word.
    pub async fn generate(&self, case: &Case, max_tokens: u32, mut on_token: impl FnMut(usize)) -> Result<Answer> {
        let request = GenerateRequest {
            request_id: String::new(),
            prompt: Some(Prompt::Ids(TokenIds { ids: case.prompt_ids.clone() })),
            max_tokens,
            deadline_ms: u32::try_from(PROMPT_DEADLINE.as_millis()).unwrap_or(u32::MAX),
            ignore_eos: true,
        };
        let generate = async {
            let mut stream = self.client.clone().generate(request).await.map_err(refused)?.into_inner();
            let mut answer = Answer::default();
            while let Some(event) = stream.message().await.map_err(refused)? {
                match event.event {
                    Some(Event::Token(token)) => {
                        answer.ids.push(token.id);
                        if answer.revisions.last() != Some(&token.revision) {
                            answer.revisions.push(token.revision);
                        }
                        on_token(answer.ids.len());
                    }
                    Some(Event::Finished(finished)) => {
                        answer.finished = finished;
                        return Ok(answer);
                    }
                    Some(Event::Prompt(_)) | None => {}
                }
            }
            Err(Error::Runner { doing: "generate".into(), why: "the stream ended without its last word".into() })
        };
        tokio::time::timeout(PROMPT_DEADLINE, generate).await.unwrap_or_else(|_| {
            Err(Error::Runner { doing: "generate".into(), why: format!("no end after {PROMPT_DEADLINE:?}") })
        })
    }

    /// What the runner says of itself.
    ///
    /// # Errors
    /// When it cannot be reached.
    pub async fn describe(&self) -> Result<DescribeResponse> {
        let mut client = self.client.clone();
        match tokio::time::timeout(CALL_DEADLINE, client.describe(DescribeRequest {})).await {
            Ok(answer) => Ok(answer.map_err(refused)?.into_inner()),
            Err(_) => {
                Err(Error::Runner { doing: "describe".into(), why: format!("no answer after {CALL_DEADLINE:?}") })
            }
        }
    }
}

fn refused(status: tonic::Status) -> Error {
    Error::Runner { doing: "ask the runner".into(), why: status.to_string() }
}

impl Answer {
    /// Whether the request was answered to its end.
    #[must_use]
    pub fn succeeded(&self) -> bool {
        matches!(self.finished.reason(), FinishReason::Length | FinishReason::Stop)
    }
}
